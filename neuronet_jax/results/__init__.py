"""Results: which inputs to segment, and the BIDS derivatives, tables and pages written for them."""
