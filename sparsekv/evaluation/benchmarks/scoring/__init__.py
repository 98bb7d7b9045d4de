"""Scores, one family a file; each gives what kvpress's evaluation gives for the same predictions.

Every family has ``score(row)``, metric → value of one row, and ``metrics(rows)``, kvpress's result for all of them. A
row is a row of the benchmark with its ``predicted_answer``. Where kvpress stops with an error (an empty prediction
under ROUGE, a number with a thousand digits), the value is 0.
"""
