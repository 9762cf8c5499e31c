"""What tests share: a synthetic head, exact models, and a tiny bundle made of them."""
