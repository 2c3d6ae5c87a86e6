"""The stages of the recipe; each reads downward like one page of the paper, and may touch the disk."""
