"""Small sequential recommenders: models, losses, the baseline's training and its evaluation."""
