"""One decoder-only transformer. Flax Linen lives in this room only; enter by :mod:`.functional`."""
