"""The posterior of particles over a map of class images × in-plane angle × shift, by search.

With whitened image y, whitened node image m and unit noise,

    log p(y | node, pose) - log p(y | noise alone) = y · m_pose - ½ ‖m_pose‖²

An image with a known CTF C is compared with C m instead: y · C m = C y · m, so that the CTF meets each image
once, and ½ ‖C m‖² does not depend on the shift. Nodes are then images without CTF.

Junk is one more class, flat: any image with the power of an image of particles, or with none, is as likely
there as any other.

With mirror images, every image is looked at twice, as it is and mirrored: its likelihood is the mean of both.

What is compared are windows: the *image* is shifted by whole pixels, the *template* is turned (and shifted
by fractions), so that all scores are matrix products of window rows with template rows. A search over all
angles and shifts with a few nodes proposes poses; all nodes are scored at the proposed poses only. The
gradient of the marginal likelihood with respect to the templates, Σ γ (y - m), is one more product; only
turning and decoding the nodes goes through autograd.

Three classes hold what is learned and known, each on top of the one before: `pictures`, `comparison`,
`placing`. On top of them lies `posterior`, which joins what the other files do; these are functions of a
comparison.
"""
