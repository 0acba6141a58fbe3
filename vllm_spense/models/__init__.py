"""What language models look like: facts about families, and the parts of a transformers model.

:mod:`.families` and :mod:`.presets` are tables; serving and the operators read them without transformers.
"""
