"""The `title` objective: a language model that answers with the title of the next item."""
