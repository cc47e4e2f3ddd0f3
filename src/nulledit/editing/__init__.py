"""From facts to keys, values and statistics: everything a solve needs."""
