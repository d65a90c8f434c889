"""SwitchBank: language models whose layers share one bank of feed-forward experts, and the parts to train them."""
