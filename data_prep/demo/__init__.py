"""The demo cohort: phantoms made from templates."""
