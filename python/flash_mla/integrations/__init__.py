"""What joins flash_mla to other frameworks: one module each, imported only when asked for."""
