"""Memory and time budgets of all models on given machines, and the report of them."""
