"""From a raw archive of scans and label maps to one finished store."""
