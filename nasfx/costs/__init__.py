"""What networks cost: counted, expected over a space, predicted by nn-Meter, measured."""
