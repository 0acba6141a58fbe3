"""Fuzzing of checkpoints: damage them at random, load them as serving does, compare with a slow reading.

``make fuzz`` runs ``__main__.py``; ``test_fuzz.py`` runs a slice of it and the corpus of what was found.
"""
