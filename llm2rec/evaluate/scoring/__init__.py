"""Scores of finished runs on the test split."""
