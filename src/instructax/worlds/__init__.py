"""The embedded world: a seeded language of instructions whose ground truth is known exactly.

`facts` holds what is true, `tasks` what can be asked, `responses` what a demonstrator answers,
`gold` what an answer is worth, `labelers` who judges it, `texts` what pretraining reads and
`world` puts the data sets together. Pure Python; imports nothing of the recipe.
"""
