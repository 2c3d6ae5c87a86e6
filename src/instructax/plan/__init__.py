"""What a config will need and cost on hardware that is not there; reads every stage's programs, runs none.

``chips`` and ``topology`` say what the hardware is, ``programs`` (of ``supervised`` and ``reinforcement``) what
would run on it, ``compiling`` asks the compiler, ``hlo``, ``traffic`` and ``timing`` read what it made of a
program, ``memory`` says what lies on a chip, ``report`` prints, ``command`` is the verb.
"""
