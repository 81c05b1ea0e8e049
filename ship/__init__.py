"""What a stranger receives: a parcel of artifacts, how to run them, and sums that prove it arrived whole."""
