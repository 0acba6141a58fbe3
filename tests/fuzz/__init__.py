"""Fuzzing of checkpoints: damage them at random, load them as serving does, compare with a slow reading.

``make fuzz`` runs :mod:`fuzz.__main__`; ``test_fuzz.py`` runs a slice of it and the corpus of what was found.
"""
