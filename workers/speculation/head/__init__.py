"""A drafter on the target's last hidden state: the network, its files, and how it is taught."""
