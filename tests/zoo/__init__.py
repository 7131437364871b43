"""Public models, tiny and randomly initialised, through the pass: ``python -m tests.zoo`` from the checkout's root.

Nothing is downloaded. A package that is not installed leaves its family out, and the summary says so. The families are
listed in ``registry.py``; ``handwritten.py`` holds forms of attention that no package above has. ``test_zoo.py`` is the
part of it that is fast enough for every change.
"""
