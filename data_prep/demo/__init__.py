"""The demo cohort: synthetic heads made from templates."""
