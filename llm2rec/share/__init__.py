"""Finished students and teachers on the Hugging Face Hub."""
