"""Data sets from the network: fetched, resumed, verified, unpacked."""
