"""What concurrent calls ask for, done together: images embedded, off the event loop, and galleries searched."""
