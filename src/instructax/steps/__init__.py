"""Train steps as free functions ``(state, batch, ...) -> (state, metrics)``; a test calls them directly."""
