"""Published methods that this project is compared with: plain SVD, and ASVD with its rank search."""
