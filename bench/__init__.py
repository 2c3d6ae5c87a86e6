"""Side by side with peers: the same work, the same inputs, one process a column, in turn.

``python -m bench`` runs it; bench/README.md says what is compared and holds the latest tables.
"""
