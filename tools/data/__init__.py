"""`megalm data`: merge, split, shuffle and inspect token files (.bin/.idx) of megalm, Megatron-LM or GPT-NeoX."""
