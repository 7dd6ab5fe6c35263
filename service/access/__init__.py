"""Who may call, and how often: keys, tokens, rights, rates, and the audit log."""
