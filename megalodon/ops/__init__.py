"""The mathematics of Megalodon as pure functions: a literal reference beside each fast form."""
