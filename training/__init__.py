"""Learns an embedding and its margin from labelled images, and writes a bundle."""
