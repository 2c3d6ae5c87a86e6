"""The losses of the recipe: arrays in, ``(loss, metrics)`` out, no model and no params in sight.

Metrics are float32 scalars under short names; a step puts its own prefix before them. They carry
no gradient. Averages that a docstring divides by ``normalizer`` add up over microbatches and
shards as the loss does; variances and maxima are those of the tokens given.
"""
