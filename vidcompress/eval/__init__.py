"""Accuracy, measured: question suites, the loop that asks them of every method, and the tables of what came out."""
