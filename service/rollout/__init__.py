"""Which models answer: where bundles are found, how they are loaded, swapped, and remembered after a restart."""
