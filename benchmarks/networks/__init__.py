"""Real architectures with random weights, within budgets."""
