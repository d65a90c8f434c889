"""Comparisons: each is configurations of the trainer, and a table of what came of them."""
