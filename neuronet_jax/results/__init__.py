"""Results: finding the input scans, and writing BIDS derivatives, tables and report pages."""
