"""Memory and time budgets of all models on given machines, and reports of them."""
