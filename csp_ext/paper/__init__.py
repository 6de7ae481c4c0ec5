"""The paper's tables and figures, measured again: ``csp paper table1`` and so on."""
