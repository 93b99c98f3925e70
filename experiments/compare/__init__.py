"""Compares networks at equal budgets: one for all protocols with one for each, families, and settings of a family."""
