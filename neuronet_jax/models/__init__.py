"""The network: one shared encoder, one decoder per protocol."""
