package dev.flrc.engine;

import java.io.File;
import java.util.List;

/**
 * What the model's chat template puts between the words of a conversation: {@code chat_frames.json} of a bundle
 * (docs/format.md), which the exporter writes where it says all that the template does.
 */
public final class ChatFrames {
    private static final String FILE_NAME = "chat_frames.json";

    /** A message of {@code system}, {@code user} or {@code assistant}. */
    public static final class Message {
        final String role;
        final String content;

        public Message(String role, String content) {
            this.role = role;
            this.content = content;
        }
    }

    private final Fields frames;
    private final boolean trim;

    private ChatFrames(Fields frames) throws FormatException {
        frames.only("start", "user_to_answer", "user_to_assistant", "assistant_to_user", "start_system",
            "system_to_user", "trim");
        for (String name : new String[] {"start", "user_to_answer", "user_to_assistant", "assistant_to_user"}) {
            frames.text(name);
        }
        if (frames.has("start_system")) {
            frames.text("start_system");
            frames.text("system_to_user");
        }
        this.frames = frames;
        this.trim = frames.flag("trim", false);
    }

    /** The frames of a bundle, or null: it has no chat template, or one that frames cannot say. */
    public static ChatFrames open(File folder, Manifest manifest) throws FlrcException {
        if (!manifest.files.containsKey(FILE_NAME)) {
            return null;
        }
        Object raw = BundleFiles.readJson(BundleFiles.resolveInside(folder, FILE_NAME));
        return new ChatFrames(Fields.of(raw, FILE_NAME));
    }

    /**
     * The prompt of a conversation, to be encoded without special tokens around it.
     *
     * @param messages perhaps a system message, then user and assistant in turn, the user last
     * @throws FlrcException they come in another order, or the model takes no system message
     */
    public String render(List<Message> messages) throws FlrcException {
        StringBuilder text = new StringBuilder();
        String before = "";
        for (Message message : messages) {
            String joint = joint(before, message.role);
            if (joint == null || !frames.has(joint)) {
                throw new FlrcException("a " + message.role + " message cannot follow "
                    + (before.isEmpty() ? "the beginning" : before), joint == null ? "" : "leave the system message out");
            }
            text.append(frames.text(joint)).append(trim ? strip(message.content) : message.content);
            before = message.role;
        }
        if (!before.equals("user")) {
            throw new FlrcException("the last message is not the user's");
        }
        return text.append(frames.text("user_to_answer")).toString();
    }

    private static String joint(String before, String role) {
        switch (before + ">" + role) {
            case ">user":
                return "start";
            case ">system":
                return "start_system";
            case "system>user":
                return "system_to_user";
            case "user>assistant":
                return "user_to_assistant";
            case "assistant>user":
                return "assistant_to_user";
            default:
                return null;
        }
    }

    /** Python's {@code str.strip}. */
    private static String strip(String text) {
        int start = 0;
        int end = text.length();
        while (start < end && isSpace(text.charAt(start))) {
            start++;
        }
        while (end > start && isSpace(text.charAt(end - 1))) {
            end--;
        }
        return text.substring(start, end);
    }

    private static boolean isSpace(char c) {
        return c >= 0x09 && c <= 0x0D || c >= 0x1C && c <= 0x20 || c == 0x85 || Character.isSpaceChar(c);
    }
}
