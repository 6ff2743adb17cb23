"""The steps of ``python -m models``: learn, judge, complete, infer, report."""
