"""Test scores of finished runs."""
