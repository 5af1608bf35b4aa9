"""Code that ``bat-export hf`` copies beside the weights; it imports torch and transformers only."""
