"""The codecs' arithmetic: `reference` is its specification, in torch; compiled backends make the same bytes."""
