"""How numbers become bytes: one file per scheme of scales, named as plans name it."""
