"""The `title` objective: a language model that generates the title of the next item."""
