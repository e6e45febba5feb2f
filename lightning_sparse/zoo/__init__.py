"""Networks, data and recipes of the papers."""
