package dev.flrc.engine;

/** A file of a bundle is missing, or differs from what {@code flrc.json} says of it. */
public final class VerificationException extends FlrcException {
    public VerificationException(String message, String hint) {
        super(message, hint);
    }

    public VerificationException(String message) {
        super(message);
    }
}
