"""The search: everything of the package that knows Optuna."""
