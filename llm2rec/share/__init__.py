"""Uploads finished students and teachers to the Hugging Face Hub."""
